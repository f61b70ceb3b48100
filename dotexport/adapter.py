"""What a target is, under the name that other packages import it by; it lives in exports/."""

from __future__ import annotations

from dotexport.exports.target import Logits, Rehearsal, Session, Target, Tokens

__all__ = ["Logits", "Rehearsal", "Session", "Target", "Tokens"]
