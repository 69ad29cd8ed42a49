"""Help texts shared by several configurations, and the headings of ``--help``."""

TASKS = "multiple-choice tasks: JSONL files or folders (such as KoBEST), separated by commas, or 'embedded'"
REVISION = "branch, tag or commit, if the model is a Hub id"
JSON = "print JSON to stdout and everything else to stderr"
DISTRIBUTED = "run as several processes, which find each other on Cloud TPU, GKE and Slurm"
PROCESS = "this process of several elsewhere: INDEX/COUNT@HOST:PORT, with the address of process 0"
TIMEOUTS = "seconds until processes that do not start, send no heartbeat, or do not leave with the others count as lost"
SHARD = "size limit of a safetensors file"
OVERWRITE = "replace an existing output once the new one is complete"

# Headings of --help.
IO, GROWTH, EXPERTS, PROOF = "input and output", "growth", "experts", "proof"
DATA, OPTIMIZER, BATCH, DEVICES = "data", "optimizer", "batch and precision", "devices"
SAVING, COMPARISON, CHECKS, OUTPUT, SAMPLING = "checkpoints and logs", "comparison", "checks", "output", "sampling"
SCAN = "scan"
