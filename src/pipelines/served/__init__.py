"""What MAX's server runs: contexts that cross processes, the tokenizer's checks, the pipeline.

MAX's registry builds these classes (`SupportedArchitecture.pipeline_cls`, `tokenizer`,
`context_type`, `memory_planner`), and its scheduler drives the pipeline.
"""
