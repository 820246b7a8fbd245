"""Executes the PTX that Triton compiles, on the CPU: results, faults and memory traffic of a kernel, without a GPU.

``parsing`` reads the text and ``control_flow`` lays its blocks out; ``decoding`` makes a function of each instruction, by
the files of its family (``arithmetic``, ``moves``, ``exchanges``, ``matrices``, ``warpgroups``, ``global_access``,
``shared_access``, ``copies``, ``stack``); ``machine`` runs a launch, many programs in lockstep. ``allocations``,
``ordering`` and ``shared_memory`` are the memory and what may go wrong there, ``findings`` what did, ``traffic`` what was
moved. ``launches`` feeds it the launches of our ops, ``cases`` are calls of these ops, ``checking`` compares them with the
reference, ``report`` and ``command`` print. ``faults`` plants mistakes that the machine must see.
"""
