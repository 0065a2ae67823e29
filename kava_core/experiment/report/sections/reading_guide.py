"""Explain how to read a report: what its numbers mean, and what they do not."""

from __future__ import annotations

from kava_core.experiment.report.pages.page_elements import Paragraph, Section

PARAGRAPHS = {
    "Seeds are the unit": (
        "A seed decides initial weights, data order and dropout, the same in every variant. What is "
        "tested is the difference between two variants on the same seed. The examples of one seed share "
        "one student, so they are no independent evidence: a test on them finds 18 % false differences at "
        "a nominal 5 %. Below 8 shared seeds results are called descriptive: with five, no exact "
        "paired test falls below 0.0625."
    ),
    "The test": (
        "Verdicts come from the sign-flip test. If two variants differ by nothing, each seed’s difference is "
        "as likely as its negative; p is the share of all changes of sign whose mean is at least as far from "
        "0 as the one seen. Up to 20 seeds all are tried, so that p is exact and no distribution is assumed; "
        "beyond, 200,000 are drawn. A t-test stands beside it and decides nothing. A difference that is "
        "smaller than one interval between evaluations is never called better: the curves do not resolve it."
    ),
    "Targets that were not met": (
        "A run that does not reach the target is shown as a bound, > 600: looked at for 600 steps. In the "
        "test it counts one evaluation more, where both variants miss it they count alike, and means with "
        "such runs are lower bounds. A variant that missed the target on a seed where the other one met it "
        "is never called better, as nothing bounds what it would have taken."
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
        "untrained_teacher is the same architecture with random weights of the trained ones’ scale, "
        "shuffled_weights with the trained numbers permuted; token_identity puts a fixed random vector for "
        "each token in place of keys and values; "
        "random_alignment replaces learned width projections by random ones; frozen_probe keeps the "
        "student fixed, so that only aligners learn. KV distillation counts as helping only where the "
        "treatment beats no_kv, shuffled_teacher, untrained_teacher and token_identity: the first alone can "
        "be regularisation, and telling one token from another needs no teacher that knows anything."
    ),
    "Shared runs": (
        "Runs with the same numbers at every evaluation are one set of runs, in how many variants or "
        "experiments they stand: what is found against one of them is no second finding against another."
    ),
}


def reading_section() -> Section:
    """Return a paragraph for each thing that is easily misread."""
    return Section(
        "reading", "How to read this", [Paragraph(text, title=name) for name, text in PARAGRAPHS.items()]
    )
