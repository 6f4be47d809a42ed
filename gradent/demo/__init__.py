"""The paper's sentiment experiment (Section 4.3) in miniature: `gradent demo`."""

from gradent.demo.run import run_demo

__all__ = ["run_demo"]
