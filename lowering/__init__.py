"""Graph -> Program: what runs, as fx modules and, for the ops that need one, forms of their own."""

from .early import begin_building
from .lower import lower
from .program import Choice, Program
from .table import TARGETS, Form, form_of, targets_of

__all__ = ["TARGETS", "Choice", "Form", "Program", "begin_building", "form_of", "lower", "targets_of"]
