"""Write a report down: HTML, Markdown, CSV."""
