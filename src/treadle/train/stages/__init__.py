"""LoRA-PAR's training: stages of SFT and GRPO through TRL, each of which moves its own region of one adapter.

factors     what is trained: A and B of every module, and what the start has put into them
starts      where they begin: zero, Gaussian, PiSSA, OLoRA
acting      the model as a stage sees it: the ranks that it trains are a PEFT adapter, all others only act
settings    what a stage is told
rewards     what a completion is worth, by name
mathematics whether two answers are equal
supervised  a stage of SFT
rollouts    a stage of GRPO
hosting     arguments, records and checkpoints of both
trl         the trainers themselves
run         what a run is told: systems, how parameters are shared out among them, stages
measuring   what each system selects, by importance on its own samples
state       what a run keeps between its stages
training    the whole run
"""
