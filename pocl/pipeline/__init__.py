"""The phases of a run, a module each, in the order in which :mod:`pocl.pipeline.phases` passes them:

    validate        reads the samples, finds where to go on, and plans the stages
    load            loads the models, chooses how much is done at once, and encodes the samples
    rank            orders the training samples by difficulty
    evaluate        scores the teacher; the same scores the student while it is trained
    cache_teacher   computes the teacher's hidden states
    train           trains the student through the stages
    export          writes the final weights, `result.json` and the report

:mod:`~pocl.pipeline.context` has what they share, and :mod:`~pocl.pipeline.input_pins` the inputs that a continued run
must find as they were.
"""
