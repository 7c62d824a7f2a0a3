"""The figures of the MrRoPE paper (arXiv 2601.22181) for a model of the user's own: `mrrope figure KIND MODEL`.

radix (its Fig. 2), factors (3), bound (5), attention (6), bands (7 and 8). Each module measures or computes first and
draws afterwards: what it returns holds every number of its picture.
"""
