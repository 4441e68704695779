"""The stages of an experiment. Each turns a section of the configuration and its input artifacts into one artifact:

    base -> zoo -> generator -> samples -> evaluation -> report

A stage is a plain function `build(experiment, artifacts, context)`; Ray runs it on workers, tests call it directly.
Imports reports, generators and below.
"""
