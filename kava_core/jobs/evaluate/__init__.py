"""Judge a trained student on files of examples: ``kava eval``."""
