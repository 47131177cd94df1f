"""Inference: prompts in, completions out.

Owns tokenisation, sampling, scheduling and the backends that run a model.
Runs with torch, transformers and the standard library alone. Never imports S3, Prefect or another room.

    flows -> tasks -> inference | storage
                      ^^^^^^^^^
"""
