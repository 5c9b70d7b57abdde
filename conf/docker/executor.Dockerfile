# The image of Spark's drivers and executors: Java 17, pyspark's Spark, the jars of Delta and S3, miniplm with its scorer.
#
#   pip wheel --no-deps -w dist . && docker build -f conf/docker/executor.Dockerfile -t miniplm:0.1.0 .
#
# Spark on Kubernetes starts it with the word `driver` or `executor` (entrypoint.sh); any other command runs as it is:
# docker run miniplm:0.1.0 miniplm doctor
FROM python:3.11-slim-bookworm

# The newest fixes of Debian are wanted, so these packages have no versions.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends openjdk-17-jre-headless procps tini \
    && rm -rf /var/lib/apt/lists/*

# Spark's own images use this number. The folder of the cache is writable: nodes keep model files there.
ENV MINIPLM_CACHE=/opt/miniplm/cache
RUN useradd --uid 185 --gid 0 --create-home --home-dir /opt/miniplm spark

ARG EXTRAS=spark,score,annotate,s3
COPY constraints.txt dist/miniplm-*.whl /tmp/wheel/
RUN python -m venv /opt/miniplm \
    && /opt/miniplm/bin/pip install --no-cache-dir -c /tmp/wheel/constraints.txt \
       "$(echo /tmp/wheel/miniplm-*.whl)[${EXTRAS}]"
ENV PATH=/opt/miniplm/bin:$PATH \
    PYSPARK_PYTHON=/opt/miniplm/bin/python \
    SPARK_HOME=/opt/miniplm/lib/python3.11/site-packages/pyspark

# The jars come by their Maven coordinates, and lie on Spark's class path: no pod asks Maven for them.
COPY conf/docker/fetch_jars.py conf/docker/entrypoint.sh /opt/miniplm/
COPY conf/spark/gpus.sh /opt/spark/gpus.sh
RUN python /opt/miniplm/fetch_jars.py \
    && ln -s "$MINIPLM_CACHE"/ivy/jars/*.jar "$SPARK_HOME/jars/" \
    && chmod 755 /opt/miniplm/entrypoint.sh /opt/spark/gpus.sh \
    && ln -s /opt/miniplm/lib/python3.11/site-packages/jobs /opt/miniplm/jobs \
    && chown -R 185:0 "$MINIPLM_CACHE"

USER 185
WORKDIR /opt/miniplm
ENTRYPOINT ["tini", "--", "/opt/miniplm/entrypoint.sh"]
CMD ["miniplm", "--help"]
