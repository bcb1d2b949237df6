"""Stages in order: recipes, carried out, kept and resumed."""
