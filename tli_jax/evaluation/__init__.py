"""Evaluation: loss on texts, and multiple-choice tasks."""
