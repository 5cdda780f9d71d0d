"""Checkpoints whose weights have few bits already, as other programs wrote them: one file per format.

A format answers for each plain weight (`...q_proj.weight`) and a range of its rows the float32 values, and, where our
own format holds its codes, the codes: they are never rounded again. See `weight.py` for what is exact.
"""
