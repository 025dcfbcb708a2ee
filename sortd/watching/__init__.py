"""Parts of the watcher: inotify, hints, scans."""
