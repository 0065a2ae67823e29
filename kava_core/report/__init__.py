"""``kava report``: what finished experiments say, as pages, figures and tables. No torch here."""
