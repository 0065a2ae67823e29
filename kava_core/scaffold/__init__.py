"""New plugins and new specs, written from templates. No torch here."""
