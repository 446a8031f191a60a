"""Autoregressive generation: prefill, decode, sampling, beams, speculation."""
