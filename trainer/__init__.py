"""The trainer: reads packed Delta tables, writes model folders and MLflow runs. Uses torch; no JVM, no Spark.

`__main__` (the command) calls `train`, `evaluation.run` or `scaling.command`. `train` prepares a training
(`preparation`) and runs its steps (`training`), which call `loop`.
Input and output are in `loader` (Delta, Arrow), `checkpoints` (local disk), `records` (the result of a training),
`results` (model folder, MLflow's registry) and `tracking` (MLflow). The numeric modules (`loop`, `schedule`, `losses`,
`loader.order`) compute with torch and numpy only.

`scaling.command` fits laws to finished runs: `scaling.runs` reads the runs from MLflow, `scaling.laws` fits the laws
(numpy and scipy), and `scaling.plot` draws them.
"""
