"""The tests of sortd."""

import os

# Several processes run the tests, each of which would start a thread of OpenBLAS for each processor. On a busy machine
# they wait for each other by spinning: one test of many small products took 158 s of processor time, with one 19 s.
# It is read when numpy is imported, which is after this package.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
