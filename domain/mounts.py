"""On which file system a path lies, from the table of mounts that Linux keeps."""

import re
from pathlib import Path
from typing import Final

NETWORK_FILE_SYSTEMS: Final = frozenset(
    {
        *("nfs", "nfs4", "cifs", "smb3", "smbfs", "ncpfs", "afs", "ceph", "fuse.ceph", "fuse.cephfs", "glusterfs"),
        *("fuse.glusterfs", "lustre", "gpfs", "beegfs", "ocfs2", "gfs2", "fuse.sshfs", "fuse.s3fs", "fuse.gcsfuse"),
        *("fuse.rclone", "fuse.juicefs", "fuse.blobfuse2", "wekafs", "davfs", "fuse.davfs2", "fuse.goofys"),
        *("fuse.mountpoint-s3", "fuse.mfs", "fuse.moosefs", "fuse.seaweedfs", "fuse.alluxio-fuse", "fuse.lizardfs"),
        *("orangefs", "pvfs2", "panfs", "coda", "fuse.curlftpfs", "fuse.smbnetfs", "fuse.nfs", "fuse.quobyte"),
    }
)
"""Types of file systems that several machines mount, as the kernel names them."""

_MOUNTS: Final = Path("/proc/self/mountinfo")
_ESCAPED: Final = re.compile(r"\\([0-7]{3})")


def network_file_system(path: Path, *, mounts: Path = _MOUNTS) -> str | None:
    """The type of the network file system that a path lies on; null for a local one, and where that is not known.

    Args:
        path: of a file or directory that need not exist.
        mounts: a file in the format of `/proc/self/mountinfo`, see proc(5).
    """
    # Before the table is read: a directory of an automounter is mounted when something looks into it.
    target = path.resolve()
    try:
        lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    kind, depth = None, -1
    for line in lines:
        fields, separator, details = line.partition(" - ")
        columns = fields.split(" ")
        if not separator or len(columns) < 5:
            continue
        # Spaces and the like are written as octal numbers.
        mount_point = Path(_ESCAPED.sub(lambda match: chr(int(match[1], 8)), columns[4]))
        # Of two mounts on one directory the later covers the earlier.
        if target.is_relative_to(mount_point) and len(mount_point.parts) >= depth:
            kind, depth = details.split(" ")[0], len(mount_point.parts)
    return kind if kind in NETWORK_FILE_SYSTEMS else None
