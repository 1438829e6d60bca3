"""Adapter on signature.py until the real security module is merged."""

from tercet.server.signature import check as check_signature
from tercet.server.signature import sign as sign_model

__all__ = ["check_signature", "sign_model"]
