"""Where published models lie: the Hugging Face hub and ModelScope, behind one small interface.

Tokens come from the environment alone (HF_TOKEN, MODELSCOPE_API_TOKEN) and reach no file.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kinema.errors import UserError

PARTIAL = ".kinema-partial"
"""Folder, in the target, of files that are not complete yet; named by their content, so that none is mistaken."""
_LARGEST_PLAIN = 50_000_000_000
"""Bytes of a file above which the Hugging Face hub serves it through its own client alone."""


@dataclass(frozen=True)
class HubFile:
    """One file of a repository: its size in bytes, and the hash that tells its content ("" if unknown)."""

    path: str
    size: int
    identity: str = ""


@dataclass(frozen=True)
class Repository:
    """A repository at one commit."""

    name: str
    commit: str
    files: tuple[HubFile, ...]


class Hub(Protocol):
    """What `kinema.families.download` needs of a hub."""

    title: str
    main: str
    """Its usual branch."""

    def look(self, name: str, revision: str | None) -> Repository:
        """List a repository; UserError if it, or the revision, is not there or not for this user."""

    def admit(self, repository: Repository) -> None:
        """UserError if files of this repository are not for this user, though its list is."""

    def fetch(self, repository: Repository, file: HubFile, directory: Path) -> None:
        """Put one file at ``directory / file.path``, going on where an earlier attempt stopped."""


def open_hub(name: str) -> Hub:
    """The hub of this name; UserError if its package is not installed."""
    return HuggingFace() if name == "huggingface" else ModelScope()


def same_content(path: Path, file: HubFile) -> bool:
    """Whether this file on disk has the content of that one; reads it only if the size is right."""
    if not file.identity or not path.is_file() or path.stat().st_size != file.size:
        return False
    digest = hashlib.sha256() if len(file.identity) == 64 else hashlib.sha1(f"blob {file.size}\0".encode())
    with path.open("rb") as opened:
        while chunk := opened.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest() == file.identity


class HuggingFace:
    """The Hugging Face hub, or one of its mirrors (HF_ENDPOINT)."""

    title = "the Hugging Face hub"
    main = "main"

    def __init__(self) -> None:
        self.token: str | bool = os.environ.get("HF_TOKEN") or False

    def look(self, name: str, revision: str | None) -> Repository:
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        api = HfApi(token=self.token)
        try:
            commit = api.model_info(name, revision=revision).sha
            assert commit is not None
            tree = api.list_repo_tree(name, recursive=True, revision=commit)
            files = tuple(
                HubFile(one.path, one.size, one.lfs.sha256 if one.lfs else one.blob_id)
                for one in tree
                if isinstance(one, RepoFile)
            )
        except Exception as error:
            raise self._explained(error, name, revision) from None
        return Repository(name, commit, files)

    def admit(self, repository: Repository) -> None:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        try:
            url = hf_hub_url(repository.name, repository.files[0].path, revision=repository.commit)
            get_hf_file_metadata(url, token=self.token)
        except Exception as error:
            raise self._explained(error, repository.name, repository.commit) from None

    def fetch(self, repository: Repository, file: HubFile, directory: Path) -> None:
        from huggingface_hub import hf_hub_download

        try:
            if file.size > _LARGEST_PLAIN:
                commit = repository.commit
                hf_hub_download(repository.name, file.path, revision=commit, local_dir=directory, token=self.token)
            else:
                self._fetch_plain(repository, file, directory)
        except Exception as error:
            raise self._explained(error, repository.name, repository.commit) from None

    def _fetch_plain(self, repository: Repository, file: HubFile, directory: Path) -> None:
        """Append to what is there of the file already: the hub's own client begins files anew in every process."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        url = hf_hub_url(repository.name, file.path, revision=repository.commit)
        place = get_hf_file_metadata(url, token=self.token).location
        # Elsewhere (a content network) the address itself is the permission, and a token has no business.
        own = place.split("/")[2] == url.split("/")[2]
        headers = build_hf_headers(token=self.token if own else False)
        partial = directory / PARTIAL / (file.identity or file.path.replace("/", "--"))
        partial.parent.mkdir(parents=True, exist_ok=True)
        there = partial.stat().st_size if partial.is_file() else 0
        if there > file.size:
            partial.unlink()
            there = 0
        with partial.open("ab") as opened:
            if there < file.size or not file.size:
                name = Path(file.path).name
                size = file.size
                http_get(place, opened, resume_size=there, headers=headers, expected_size=size, displayed_filename=name)
        if file.identity and not same_content(partial, file):
            partial.unlink()
            raise UserError(
                f"{file.path} of {repository.name} arrived damaged and was removed. Start the command again."
            )
        target = directory / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial, target)

    def _explained(self, error: Exception, name: str, revision: str | None) -> Exception:
        """The UserError that says what to do; the error itself if it is none of the hub's or the network's."""
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            OfflineModeIsEnabled,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        if isinstance(error, UserError):
            return error
        if isinstance(error, GatedRepoError):
            page = str(error.response.url).split("/api/")[0].split(f"/{name}/")[0]
            held = "The token in HF_TOKEN belongs to an account that has not been let in yet. " if self.token else ""
            return UserError(
                f"{name} is gated: its authors ask you to accept their terms. {held}Log in and accept them on "
                f"{page}/{name}, make a token with read access on {page}/settings/tokens, and start again with it in "
                "the environment: HF_TOKEN=hf_..."
            )
        if isinstance(error, RevisionNotFoundError):
            return UserError(f"--revision: {name} on {self.title} has no revision '{revision}'.")
        if isinstance(error, RepositoryNotFoundError):
            return UserError(f"there is no {name} on {self.title}, or it is private: then set HF_TOKEN.")
        if isinstance(error, OfflineModeIsEnabled):
            return UserError(
                "HF_HUB_OFFLINE is set, and a download needs the network. Unset it, or copy the files here."
            )
        transport = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
        if isinstance(error, transport) or (isinstance(error, OSError) and error.errno is None):
            return UserError(
                f"{self.title} did not answer as expected ({type(error).__name__}: {_first_line(error)}). Start the "
                "command again: it goes on where it stopped."
            )
        return error


class ModelScope:
    """ModelScope, through its own package."""

    title = "ModelScope"
    main = "master"

    def __init__(self) -> None:
        try:
            from modelscope_hub import HubApi
        except ImportError:
            raise UserError(
                "--from modelscope needs ModelScope's package. Install it: pip install 'kinema[modelscope]' "
                "(or pip install modelscope-hub)."
            ) from None
        self.api: Any = HubApi(token=os.environ.get("MODELSCOPE_API_TOKEN"))

    def look(self, name: str, revision: str | None) -> Repository:
        try:
            rows = self.api.legacy.list_repo_files(name, "model", revision=revision or self.main, recursive=True)
        except Exception as error:
            raise self._explained(error, name, revision) from None
        rows = [row for row in rows if row.get("Type") != "tree"]
        # ModelScope names a commit for each file; the newest of them is that of the revision.
        newest: dict[str, Any] = max(rows, key=lambda row: row.get("CommittedDate") or 0, default={})
        commit = newest.get("Revision") or revision or self.main
        files = tuple(HubFile(row["Path"], int(row["Size"]), row.get("Sha256") or "") for row in rows)
        return Repository(name, commit, files)

    def admit(self, repository: Repository) -> None:
        """ModelScope lists no repository whose files it refuses."""

    def fetch(self, repository: Repository, file: HubFile, directory: Path) -> None:
        check = {"expected_sha256": file.identity or None, "file_size": file.size}
        place = {"revision": repository.commit, "local_dir": directory}
        try:
            self.api.download_file(repository.name, "model", file.path, **place, **check)
        except Exception as error:
            raise self._explained(error, repository.name, repository.commit) from None

    def _explained(self, error: Exception, name: str, revision: str | None) -> Exception:
        from modelscope_hub.errors import AuthenticationError, HubError, NotExistError, PermissionDeniedError

        if isinstance(error, AuthenticationError | PermissionDeniedError):
            return UserError(
                f"{name} is not for everybody. Accept its terms on its page on ModelScope, then start again with your "
                "token in the environment: MODELSCOPE_API_TOKEN=..."
            )
        if isinstance(error, NotExistError):
            at = f" with a revision '{revision}'" if revision else ""
            return UserError(f"there is no {name}{at} on ModelScope. If it has another name there, give it: --repo.")
        if isinstance(error, HubError):
            return UserError(f"ModelScope did not answer as expected ({_first_line(error)}). Start the command again.")
        return error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]
