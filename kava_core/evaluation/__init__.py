"""Judging finished students on files of tasks, and handing them over to lm-evaluation-harness."""
