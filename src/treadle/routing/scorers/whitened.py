"""SEQR's score, with layers weighed by what public prompts say of them: what `sequence` is best fed with.

For one token and layer it is `seqr`. Over a prompt, `sequence` adds up each adapter's z-scores of the layers in the
first half of the blocks with the weights of `calibration.prompts`, where `seqr` takes the plain mean of all layers; and
it knows how common a score is among public prompts, so that the base may act on what belongs to nobody.

FLOPs a token and layer: those of `seqr`. Storage an adapter and layer: r(r+1)/2 + 4 numbers, and a number a public
prompt and adapter. Reference: none; after arXiv 2509.18093. Deviations: everything said here; needs the calibration
`public`.
"""

from treadle.routing.scorers.seqr import form as form
