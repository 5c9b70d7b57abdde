package miniplm.s3;

import java.io.ByteArrayOutputStream;
import java.io.IOException;
import org.apache.hadoop.conf.Configuration;
import org.apache.hadoop.fs.FSDataOutputStream;
import org.apache.hadoop.fs.FSDataOutputStreamBuilder;
import org.apache.hadoop.fs.FileAlreadyExistsException;
import org.apache.hadoop.fs.FileSystem;
import org.apache.hadoop.fs.Path;
import org.apache.spark.sql.execution.streaming.checkpointing.CheckpointFileManager.CancellableFSDataOutputStream;
import org.apache.spark.sql.execution.streaming.checkpointing.FileSystemBasedCheckpointFileManager;

/**
 * Files of a streaming query's checkpoint on S3, each written by one put.
 *
 * Spark's own manager writes a temporary file and renames it, which on S3 is a copy and a delete, and replaces a file
 * that another driver has made meanwhile. Set it with
 * spark.sql.streaming.checkpointFileManagerClass=miniplm.s3.ConditionalPutFileManager.
 */
public class ConditionalPutFileManager extends FileSystemBasedCheckpointFileManager {

  public ConditionalPutFileManager(Path path, Configuration hadoopConf) {
    super(path, hadoopConf);
  }

  @Override
  public CancellableFSDataOutputStream createAtomic(Path path, boolean overwriteIfPossible) {
    if (!fs().getScheme().startsWith("s3")) {
      return super.createAtomic(path, overwriteIfPossible);
    }
    return overwriteIfPossible ? new Overwriting(replacing(path)) : new Creating(fs(), path, new ByteArrayOutputStream());
  }

  private FSDataOutputStream replacing(Path path) {
    try {
      FSDataOutputStreamBuilder<?, ?> builder = fs().createFile(path).overwrite(true);
      builder.opt("fs.s3a.create.performance", true);
      return builder.build();
    } catch (IOException error) {
      throw new java.io.UncheckedIOException(error);
    }
  }

  /** Replaces the object when it is closed. */
  private static final class Overwriting extends CancellableFSDataOutputStream {
    private final FSDataOutputStream out;
    private boolean ended;

    Overwriting(FSDataOutputStream out) {
      super(out);
      this.out = out;
    }

    @Override
    public void close() throws IOException {
      if (!ended) {
        ended = true;
        super.close();
      }
    }

    @Override
    public void cancel() {
      if (!ended) {
        ended = true;
        out.abort();
      }
    }
  }

  /** Creates the object when it is closed; its content is small. */
  private static final class Creating extends CancellableFSDataOutputStream {
    private final FileSystem fs;
    private final Path path;
    private final ByteArrayOutputStream content;
    private boolean ended;

    Creating(FileSystem fs, Path path, ByteArrayOutputStream content) {
      super(content);
      this.fs = fs;
      this.path = path;
      this.content = content;
    }

    @Override
    public void close() throws IOException {
      if (ended) {
        return;
      }
      ended = true;
      super.close();
      if (!ConditionalPut.create(fs, path, content.toByteArray())) {
        throw new FileAlreadyExistsException(path + " already exists");
      }
    }

    @Override
    public void cancel() {
      ended = true;
    }
  }
}
