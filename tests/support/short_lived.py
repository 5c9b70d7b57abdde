"""Settings for JVMs that live a minute and tables of a few rows."""

# The second compiler, a parallel collector and the checks of Spark's own classes cost more than they give: a third of
# the processor seconds of a driver's and its executors' start (measured). One compiler alone has a small code cache by
# default, which Spark fills in minutes: the JVM then throws compiled code away as fast as it makes it.
JAVA_OPTIONS = (
    "-XX:TieredStopAtLevel=1 -XX:ReservedCodeCacheSize=240m -XX:+UseSerialGC -XX:-UsePerfData "
    "-XX:+UnlockDiagnosticVMOptions -XX:-BytecodeVerificationRemote"
)
# For a query over a few rows, compiling takes most of the time. Adaptive execution plans it again after every stage.
SMALL_TABLES = {
    "spark.sql.adaptive.enabled": "false",
    "spark.sql.codegen.wholeStage": "false",
    "spark.sql.codegen.factoryMode": "NO_CODEGEN",
    "spark.databricks.delta.snapshotPartitions": "1",
    "spark.sql.shuffle.partitions": "1",
}
