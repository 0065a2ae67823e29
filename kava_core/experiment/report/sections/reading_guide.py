"""Explain how to read a report: what its numbers mean, and what they do not."""

from __future__ import annotations

from kava_core.experiment.report.pages.page_elements import Paragraph, Section

PARAGRAPHS = {
    "Seeds are the unit": (
        "A seed decides initial weights, data order and dropout, the same in every variant. What is "
        "tested is the difference between two variants on the same seed. The examples of one seed share "
        "one student, so they are no independent evidence: a test on them finds 18 % false differences at "
        "a nominal 5 %. Below 5 shared seeds results are called descriptive: with three, no exact "
        "paired test falls below 0.25."
    ),
    "Intervals": (
        "The t-interval covers the mean difference with 95 % if differences are roughly normal. The "
        "bootstrap draws seeds anew, then examples within each seed; it needs no such assumption, but is "
        "too narrow with few seeds (75 % at three), so it stands beside the t-interval and decides "
        "nothing. “Detectable” is the true difference that such a test finds four times out of five, "
        "given this spread."
    ),
    "Holm's correction": (
        "Of many comparisons, some look significant by chance. All comparisons that the spec declares are "
        "one family; Holm's procedure raises their p-values so that the chance of any false finding in "
        "the family stays below 5 %. Bonferroni's stricter numbers are shown beside it. Comparisons that "
        "are added after results were seen void this promise, so a change is reported."
    ),
    "Budgets": (
        "A variant that read more tokens or spent more operations may be better for that alone. “Better” "
        "and “worse” are refused where budgets differ by more than the declared tolerance (1 % unless "
        "said otherwise) and the spec does not declare the inequality."
    ),
    "Controls": (
        "no_kv trains without any KV loss; shuffled_teacher shows every example another example's cache; "
        "random_alignment replaces learned width projections by random ones; frozen_probe keeps the "
        "student fixed, so that only aligners learn. KV distillation counts as helping only where the "
        "treatment beats no_kv and shuffled_teacher: beating the first alone can be regularisation."
    ),
}


def reading_section() -> Section:
    """Return a paragraph for each thing that is easily misread."""
    return Section(
        "reading", "How to read this", [Paragraph(text, title=name) for name, text in PARAGRAPHS.items()]
    )
