"""Measurements of a subject: perplexity, trivia questions, multiple choice, and the statistics to compare two."""
