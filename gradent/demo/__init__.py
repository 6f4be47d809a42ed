"""The paper's sentiment experiment (Section 4.3) in miniature: `gradent demo`.

`statements` draws or reads what is judged, `task` words the responses, `model` builds a language model on the spot,
`train` fine-tunes it and runs TRL's DPOTrainer once a style, `findings` reads the paper's findings off the records,
`run` does all of it.
"""

from gradent.demo.run import run_demo

__all__ = ["run_demo"]
