"""Say what finished experiments show, as pages, figures and tables: ``kava report``. No torch here."""
