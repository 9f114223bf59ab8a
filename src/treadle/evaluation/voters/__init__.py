"""Voters by name, one a file, and the one way to make any of them ready."""

from treadle.evaluation.voters.endpoint import endpoint_voter
from treadle.evaluation.voters.endpoint_settings import EndpointVoter
from treadle.evaluation.voters.field import FieldVoter, field_voter
from treadle.evaluation.voters.local import LocalVoter, local_voter
from treadle.evaluation.voters.random import RandomVoter, random_voter
from treadle.evaluation.voters.rule import RuleVoter, rule_voter
from treadle.evaluation.voters.voter import Ballots, Cost, Poll, Question, Vote, Voter

VoterSettings = EndpointVoter | LocalVoter | FieldVoter | RuleVoter | RandomVoter

__all__ = ["Ballots", "Cost", "Poll", "Question", "Vote", "Voter", "VoterSettings", "prepared"]


def prepared(settings: VoterSettings, poll: Poll) -> Voter:
    """The voter, its settings held against the poll; nobody has been asked anything yet.

    Raises:
        InputError: the settings do not fit the rows or the systems, or a file, a model or a key is missing.
        UnavailableError: a model must be fetched and cannot be.
    """
    match settings:
        case EndpointVoter():
            return endpoint_voter(settings, poll)
        case LocalVoter():
            return local_voter(settings, poll)
        case FieldVoter():
            return field_voter(settings, poll)
        case RuleVoter():
            return rule_voter(settings, poll)
        case RandomVoter():
            return random_voter(settings, poll)
