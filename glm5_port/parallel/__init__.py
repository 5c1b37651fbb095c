"""Parallel plans: which layout suits given chips and wires, why, what it costs, and how it is started.

quantities    "200 GB/s": numbers with units
description   YAML files with line numbers in their errors
hardware      chips and their figures, each with source and confidence
topology      levels of links, and what a group of ranks gets out of them
sharding      which rank holds which part of a tensor; bytes of each rank, exactly
plan          ParallelPlan: a layout as validated data
cost/         what a step costs, term by term
engines       what each engine can express
planner       searches layouts, ranks them, says what would change the choice
recipes       the commands that start a plan
support       what this library's own execution cannot run
rows          which tokens of a step are computed where
placement     which expert lies in which slot
collectives   what ranks of a process group send each other
execute       a layout on torch.distributed
launch        starts a plan on the processes of torchrun
probe         measures links, products and memory of the ranks of torchrun
probe_file    the topology file out of that
"""
