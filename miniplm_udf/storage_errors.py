"""One sentence for an error of an object storage: what went wrong, and what to do.

Input: an error of any client (s3fs and botocore, delta-rs, Hadoop's s3a inside a Spark error). Output: a sentence, or
None for any other error. The clients repeat requests that may succeed later; an error here is what was left after that.
No sentence holds a credential. Used by the commands and by the probe of a root; imports none of the clients.
"""

import re
from collections.abc import Iterator

from miniplm_udf.errors import first_line

# Traces of a client of an object storage in an error's class, module or text.
_CLIENT = re.compile(
    r"\b(aio)?botocore\b|\bs3fs\b|awssdk|fs\.s3a|S3AFileSystem|Generic S3 error|object_store|\bAWS[A-Z]\w+Exception"
)
_CREDENTIALS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_SENTENCES = (
    (
        r"ExpiredToken|RequestExpired|TokenRefreshRequired|token .*expired",
        "the credentials have expired; renew them and run again: what is committed is kept",
    ),
    (
        r"InvalidAccessKeyId|SignatureDoesNotMatch|InvalidToken",
        f"the service does not accept the credentials; check {_CREDENTIALS}, and storage.endpoint",
    ),
    (
        r"NoCredentials|NoAwsCredentials|[Uu]nable to (locate|load) credentials|CredentialsNotLoaded|NoAuthWithAWS",
        f"no credentials were found; set {_CREDENTIALS}, or a profile in ~/.aws, or use a machine that has a role",
    ),
    (r"RequestTimeTooSkewed", "the clock of this machine differs from the service's; set the clock"),
    (
        r"NoSuchBucket|bucket does not exist|UnknownStore|Bucket \S+ does not exist",
        "there is no such bucket; create it, or correct its name, storage.endpoint or storage.region",
    ),
    (
        r"PermanentRedirect|AuthorizationHeaderMalformed|AWSRedirect|IllegalLocationConstraint",
        "the bucket is in another region; set storage.region",
    ),
    (
        r"AccessDenied|Forbidden|AllAccessDisabled|[Ss]tatus [Cc]ode: 403",
        "the credentials lack a permission; allow s3:ListBucket on the bucket, and s3:GetObject, s3:PutObject, "
        "s3:DeleteObject and s3:AbortMultipartUpload on its objects",
    ),
    (
        r"SSLError|SSLException|SSLHandshake|certificate",
        "the TLS connection failed; check http or https in storage.endpoint, and the service's certificate",
    ),
    (
        r"SlowDown|Throttl|TooManyRequests|[Ss]tatus [Cc]ode: 503|\(503\)|Service ?Unavailable",
        "the service asked to slow down for as long as requests are repeated; run again later, or with fewer tasks",
    ),
    (
        r"EndpointConnection|ConnectTimeout|ReadTimeout|ConnectionClosed|Connection refused|UnknownHost|error sending "
        r"request|Could not connect|ClientConnector|ApiCallTimeout|HttpChannelEOF|NoHttpResponse|Connection reset|"
        r"timed out|Unable to execute HTTP request",
        "the service cannot be reached; check storage.endpoint (or AWS_ENDPOINT_URL) and the network, and run again: "
        "what is committed is kept",
    ),
    (
        r"InternalError|[Ss]tatus [Cc]ode: 50\d|\(50\d\)|AWSStatus500",
        "the service failed for as long as requests are repeated; run again: what is committed is kept",
    ),
)
_EXTRAS = {"s3fs": "s3", "gcsfs": "gcs", "adlfs": "azure"}
_LONGEST = 200


def explain(error: BaseException) -> str | None:
    """Returns the sentence for an error of an object storage.

    Args:
        error: any error.

    Returns:
        The sentence with the first line of the client's message; None if the error has another origin.
    """
    chain = list(_chain(error))
    if sentence := _missing_package(chain):
        return sentence
    text = "\n".join(f"{type(each).__module__}.{type(each).__name__}: {each}" for each in chain)
    if not _CLIENT.search(text):
        return None
    for pattern, sentence in _SENTENCES:
        if match := re.search(pattern, text):
            return f"object storage: {sentence} ({_detail(text, match, chain[-1])})"
    return (
        f"object storage: a request failed; run again: what is committed is kept ({first_line(chain[-1])[:_LONGEST]})"
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and the errors that caused it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _missing_package(chain: list[BaseException]) -> str | None:
    for error in chain:
        if isinstance(error, ImportError):
            for package, extra in _EXTRAS.items():
                if package in str(error):
                    return f"object storage: the package {package} is not installed: pip install 'miniplm[{extra}]'"
    return None


def _detail(text: str, match: re.Match[str], innermost: BaseException) -> str:
    """The line of the message that shows the reason, without the client's internal address of the object."""
    line = text[text.rfind("\n", 0, match.start()) + 1 :].partition("\n")[0].removeprefix("builtins.")
    return (line if len(line) <= _LONGEST else f"{first_line(innermost)[:_LONGEST]} ...").strip()
