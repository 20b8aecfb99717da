"""The sizes of a sweep's parts, and the limits of its numbers. Imports nothing."""

LARGEST = 2**31 - 1  # of an integer that counts, as the programs take them
OBSERVABLES = 8  # at least so many numbers are stored of a run at each time
BATCH_SIZE = 64  # lanes that a CPU device steps together at most, unless told otherwise: their states stay in its cache
BATCH_SIZE_ELSEWHERE = 2048  # and another device, which has a step's work done at once
BATCHES = 16  # in a box, about: some seconds of work, and few enough files for a million lanes
LANE = 33  # bytes of a lane's status, steps and whatever else is not over time, as `Plan.empty` has them
COPIES = 2  # of the results, and of what a start is drawn in, that memory must hold for a while
