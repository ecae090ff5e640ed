"""The ranks of a run, their collectives, and the strategies single, ddp, fsdp and hsdp.

With `pipeline.checkpoint` the only home of `torch.distributed`. May import `pipeline.config` and what lies below it.
"""
