"""Secure multi-party computation: compute parties in processes of their own, and what they receive.

The engine is SPU (SecretFlow), the extra `smpc`. Nothing here knows deployments or attacks.
"""
