"""kava's own components: one folder per kind, one file per component, named as in a spec."""
