"""Code generated from proto/proto/coeval/v1 by generate.py. Do not edit."""
