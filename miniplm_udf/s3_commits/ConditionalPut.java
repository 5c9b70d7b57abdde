package miniplm.s3;

import java.io.ByteArrayOutputStream;
import java.io.FileNotFoundException;
import java.io.IOException;
import java.io.InputStream;
import java.nio.file.AccessDeniedException;
import java.util.Arrays;
import org.apache.hadoop.fs.FSDataOutputStream;
import org.apache.hadoop.fs.FSDataOutputStreamBuilder;
import org.apache.hadoop.fs.FileSystem;
import org.apache.hadoop.fs.Options.CreateFileOptionKeys;
import org.apache.hadoop.fs.Path;

/**
 * Creates an object of S3 only if there is none with its name (If-None-Match: *), so that of two writers one is told.
 *
 * A request whose answer was lost is sent again by the client, and then fails because the first one succeeded. So a
 * failed request is followed by a read: the writer has succeeded if the object holds exactly what it wrote.
 */
final class ConditionalPut {
  private static final int TRIES = 5;
  private static final long PAUSE_MILLISECONDS = 200;

  private ConditionalPut() {}

  /**
   * Creates the object.
   *
   * @return whether it was created; false: there is an object with other content.
   * @throws IOException the request failed, and there is no object.
   */
  static boolean create(FileSystem fs, Path path, byte[] content) throws IOException {
    IOException last = null;
    for (int attempt = 0; attempt < TRIES; attempt++) {
      try {
        put(fs, path, content);
        return true;
      } catch (AccessDeniedException error) {
        throw error;
      } catch (IOException error) {
        last = error;
      }
      try {
        return Arrays.equals(read(fs, path), content);
      } catch (FileNotFoundException nothing) {
        // Another request for the same name was in progress (409 Conflict), or the storage could not be reached.
        pause(attempt);
      }
    }
    throw last;
  }

  private static void put(FileSystem fs, Path path, byte[] content) throws IOException {
    FSDataOutputStreamBuilder<?, ?> builder = fs.createFile(path).overwrite(true);
    builder.must(CreateFileOptionKeys.FS_OPTION_CREATE_CONDITIONAL_OVERWRITE, true);
    builder.opt("fs.s3a.create.performance", true);
    try (FSDataOutputStream out = builder.build()) {
      out.write(content);
    }
  }

  private static byte[] read(FileSystem fs, Path path) throws IOException {
    try (InputStream in = fs.open(path)) {
      ByteArrayOutputStream out = new ByteArrayOutputStream();
      in.transferTo(out);
      return out.toByteArray();
    }
  }

  private static void pause(int attempt) throws IOException {
    try {
      Thread.sleep(PAUSE_MILLISECONDS << attempt);
    } catch (InterruptedException interrupted) {
      Thread.currentThread().interrupt();
      throw new java.io.InterruptedIOException("interrupted while an object was created");
    }
  }
}
