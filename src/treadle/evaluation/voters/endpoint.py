"""The voter `endpoint`: a model behind any OpenAI-compatible endpoint.

prompts     one a row, from a template; equal ones are asked once
kept        what the cache has is not asked again
asking      a few at a time, at the pace and within the limits that the settings state
trouble     what may pass is tried again, after twice the last pause or after what the endpoint asks for; what is wrong
            with one prompt costs its row the vote; what is wrong with the endpoint ends the run, and nothing is lost
"""

import os
from dataclasses import replace

from treadle.errors import ConfigError
from treadle.evaluation.voters.asking import Asking
from treadle.evaluation.voters.endpoint_settings import EndpointVoter
from treadle.evaluation.voters.kept import digest, kept_answers
from treadle.evaluation.voters.voter import Ballots, Poll, Vote, Voter
from treadle.evaluation.voters.wording import load_wording, reply_format, vote_in
from treadle.progress import Progress

_IN_A_ROW = 3


def endpoint_voter(settings: EndpointVoter, poll: Poll) -> Voter:
    """The votes of the model behind the endpoint; a row whose reply names no system, or that fails, has none.

    Raises:
        ConfigError: the template does not fit, or the key's variable is not set.

    The voter itself raises UnavailableError, with all answers kept, where the endpoint refuses the key or the model,
    fails for several rows in a row, asks to wait too long, or a limit is reached.
    """
    wording = load_wording(settings.template, poll)
    key = _key(settings)
    bodies = [
        {"model": settings.model, "messages": wording.messages(poll, index), **settings.parameters}
        for index in range(len(poll.rows))
    ]
    form = reply_format(poll.names) if settings.structured else None
    asked = [digest({"body": body, "format": form}) for body in bodies]

    def cast(progress: Progress) -> Ballots:
        identity = {"url": settings.url, "model": settings.model, "template": [wording.system, wording.user]}
        identity |= {"parameters": dict(settings.parameters), "format": form, "target": poll.target}
        with kept_answers(poll.cache, identity, voter=settings.name) as kept:
            lacking = {name: body for name, body in zip(asked, bodies, strict=True) if kept.answer(name) is None}
            found = sum(kept.answer(name) is not None for name in asked)
            asking = Asking(settings, key, form, kept, patience=min(_IN_A_ROW, len(set(asked))))
            failures = asking.all(lacking, progress)
            votes = tuple(
                Vote(None, failures[name]) if name in failures else vote_in(kept.answer(name) or "", poll.names)
                for name in asked
            )
            cost = kept.cost
        return Ballots(votes, replace(cost, kept=found), asking.remarks())

    return cast


def _key(settings: EndpointVoter) -> str:
    if settings.api_key_env is None:
        return ""
    key = os.environ.get(settings.api_key_env, "").strip()
    where = f"voter {settings.name!r}"
    if not key:
        raise ConfigError(
            f"the environment has no {settings.api_key_env}", where=where, remedy="set it to the endpoint's key"
        )
    if not key.isascii() or not key.isprintable():
        raise ConfigError(f"what {settings.api_key_env} holds is no key", where=where, remedy="set it again")
    return key
