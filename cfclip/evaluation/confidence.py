"""How likely is it that a prompt's edit does what it says? Asked before anybody has measured the edit."""

from cfclip.domain import Domain


def predicted_success(domain: Domain, prompt: str) -> float | None:
    """The share of faces, in [0, 1], on which ``domain.mapper`` is expected to do what ``prompt`` says.

    What was measured of the prompt, else the smallest share measured of any of its claims, however worded.
    None where the domain has no such mapper, or where nothing is known of a claim. ``domain.confidence``:
    "measured", prompt -> share; "claims", a name as in :meth:`.GroundTruth.claims` -> share.
    """
    known = domain.confidence
    if domain.mapper is None or known is None:
        return None
    if prompt in known["measured"]:
        return known["measured"][prompt]
    claims = domain.truth.claims(prompt) if domain.truth else ()
    shares = [known["claims"].get(claim) for claim in claims]
    return min(shares, default=None) if None not in shares else None
