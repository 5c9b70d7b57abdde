package miniplm.s3;

import io.delta.storage.HadoopFileSystemLogStore;
import java.io.ByteArrayOutputStream;
import java.io.FileNotFoundException;
import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.FileAlreadyExistsException;
import java.util.Iterator;
import java.util.List;
import org.apache.hadoop.conf.Configuration;
import org.apache.hadoop.fs.FSDataOutputStream;
import org.apache.hadoop.fs.FileStatus;
import org.apache.hadoop.fs.FileSystem;
import org.apache.hadoop.fs.Path;
import org.apache.hadoop.fs.s3a.S3AFileSystem;
import org.apache.hadoop.fs.s3a.S3AUtils;
import software.amazon.awssdk.core.exception.SdkException;
import software.amazon.awssdk.services.s3.S3Client;
import software.amazon.awssdk.services.s3.model.ListObjectsV2Request;
import software.amazon.awssdk.services.s3.model.S3Object;

/**
 * A Delta log on S3 to which any number of drivers may commit: of two that write one version, one gets an error.
 *
 * Delta's own S3SingleDriverLogStore checks that the file of a commit does not exist and then overwrites it, so that a
 * second driver can replace a commit without an error. Set it with
 * spark.delta.logStore.s3a.impl=miniplm.s3.ConditionalPutLogStore. The storage has to honour If-None-Match.
 *
 * The log is listed from the version that Delta asks for, not from its beginning.
 */
public class ConditionalPutLogStore extends HadoopFileSystemLogStore {

  public ConditionalPutLogStore(Configuration hadoopConf) {
    super(hadoopConf);
  }

  @Override
  public void write(Path path, Iterator<String> actions, Boolean overwrite, Configuration hadoopConf)
      throws IOException {
    FileSystem fs = path.getFileSystem(hadoopConf);
    ByteArrayOutputStream lines = new ByteArrayOutputStream();
    while (actions.hasNext()) {
      lines.write((actions.next() + "\n").getBytes(StandardCharsets.UTF_8));
    }
    if (overwrite) {
      try (FSDataOutputStream out = fs.create(path, true)) {
        lines.writeTo(out);
      }
    } else if (!ConditionalPut.create(fs, path, lines.toByteArray())) {
      throw new FileAlreadyExistsException(path.toString());
    }
  }

  @Override
  public Iterator<FileStatus> listFrom(Path path, Configuration hadoopConf) throws IOException {
    FileSystem fs = path.getFileSystem(hadoopConf);
    Path qualified = fs.makeQualified(path);
    Path folder = qualified.getParent();
    String first = qualified.getName();
    // A vacuum also lists folders of data, from the name NUL on, and needs the folders in them.
    boolean isOfLog = folder.getName().equals("_delta_log") && !first.isEmpty() && Character.isDigit(first.charAt(0));
    if (!(fs instanceof S3AFileSystem) || !isOfLog) {
      return super.listFrom(path, hadoopConf);
    }
    String prefix = folder.toUri().getPath().substring(1) + "/";
    // S3 lists names after a given one; the log has no name between the first one and this.
    String before = first.substring(0, first.length() - 1) + (char) (first.charAt(first.length() - 1) - 1);
    S3Client client = ((S3AFileSystem) fs).getS3AInternals().getAmazonS3Client("list the Delta log");
    String bucket = ((S3AFileSystem) fs).getBucket();
    ListObjectsV2Request request =
        ListObjectsV2Request.builder()
            .bucket(bucket)
            .prefix(prefix)
            .startAfter(prefix + before)
            .delimiter("/")
            .build();
    try {
      List<FileStatus> files =
          client.listObjectsV2Paginator(request).contents().stream()
              .filter(object -> object.key().substring(prefix.length()).compareTo(first) >= 0)
              .map(object -> status(object, folder, prefix, fs))
              .toList();
      if (files.isEmpty() && !client.listObjectsV2(r -> r.bucket(bucket).prefix(prefix).maxKeys(1)).hasContents()) {
        throw new FileNotFoundException("No such file or directory: " + folder);
      }
      return files.iterator();
    } catch (SdkException error) {
      throw S3AUtils.translateException("list the Delta log", folder, error);
    }
  }

  private static FileStatus status(S3Object object, Path folder, String prefix, FileSystem fs) {
    return new FileStatus(
        object.size(),
        false,
        1,
        fs.getDefaultBlockSize(folder),
        object.lastModified().toEpochMilli(),
        new Path(folder, object.key().substring(prefix.length())));
  }

  @Override
  public Boolean isPartialWriteVisible(Path path, Configuration hadoopConf) {
    return false;
  }
}
