"""Provide kava's own components: one folder for each kind, one file for each component, named as in a spec.

A folder's ``__init__.py`` declares its components without torch; each file implements one. Files whose names
begin with an underscore are helpers.
"""
