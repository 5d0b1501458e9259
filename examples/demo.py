"""The whole line on a simulated case: simulate, remove FLAIR, synthesize it, compare, draw.

No patient data and no download. Run it with `make demo`, or `python examples/demo.py`.
"""

import sys
from pathlib import Path

import click

from cwdm.case import find_cases
from cwdm.evaluate import draw_sample, evaluate, fit_regressions, markdown, summarize
from cwdm.modality import Modality
from cwdm.montage import comparison, write_png
from cwdm.simulate import write_cases
from cwdm.synthesis import Synthesizer

TARGET = Modality.T2F
