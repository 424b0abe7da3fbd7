"""`python -m benchmarks.trainers.<name> <job>` trains the job's network once for every line it reads.

It answers in wall and processor seconds of the training alone: network, data and loader are ready before.
"""
