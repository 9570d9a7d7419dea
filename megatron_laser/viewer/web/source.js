// Where the data comes from: a server that is asked, or the block that an exported page carries. The views know one
// interface, `get(path, query)`, and what a server and a block give for it are the same objects.

import { FileSource } from "./file_source.js";
import { useEffect, useState } from "./vendor/preact_hooks.js";

const DEADLINE = 30000; // ms: a request that takes longer is given up, and said to be

/** An answer that is not there: `status` is HTTP's, 0 where nobody answered. */
export class SourceError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** `megatron-laser view`. */
export class HttpSource {
  constructor(token) {
    this.token = token;
    this.live = true;
  }

  async get(path, query = {}) {
    const text = new URLSearchParams(query).toString();
    let response;
    try {
      response = await fetch(`api/${path}${text ? `?${text}` : ""}`, {
        headers: { "X-Token": this.token },
        signal: AbortSignal.timeout(DEADLINE),
      });
    } catch (error) {
      throw new SourceError("the server does not answer: has `megatron-laser view` been ended?", 0, { cause: error });
    }
    if (response.ok) return response.json();
    const said = await response.json().catch(() => ({}));
    throw new SourceError(said.error || `the server answers ${response.status} for ${path}`, response.status);
  }
}

/** The block of an export if the page has one, else the server that it came from. */
export async function openSource() {
  const block = document.getElementById("data");
  if (block) return FileSource.read(block);
  return new HttpSource(new URLSearchParams(window.location.search).get("token") || "");
}

/**
 * Answers by address. One that is older than the data's version is still shown while the newer one is on its way, so
 * that nothing jumps. Only the most recent ones are kept: a reader may walk through thousands of responses.
 */
export class Answers {
  constructor(source, most = 200) {
    this.source = source;
    this.most = most;
    this.kept = new Map();
  }

  static key(path, query) {
    return `${path}?${new URLSearchParams(query)}`;
  }

  peek(path, query) {
    return this.kept.get(Answers.key(path, query));
  }

  /** {version, data} of at least this version; asks once for those who want the same at the same time. */
  async load(path, query, version) {
    const key = Answers.key(path, query);
    const old = this.kept.get(key);
    if (old && old.version >= version) return old;
    if (old && old.coming && old.comingVersion >= version) return old.coming;
    const entry = old || { version: -1, data: undefined };
    entry.comingVersion = version;
    entry.coming = this.source.get(path, query).then(
      (data) => {
        const found = { version, data };
        this.kept.delete(key);
        this.kept.set(key, found);
        for (const oldest of this.kept.keys()) {
          if (this.kept.size <= this.most) break;
          this.kept.delete(oldest);
        }
        return found;
      },
      (error) => {
        entry.coming = undefined;
        if (entry.version < 0) this.kept.delete(key);
        throw error;
      },
    );
    this.kept.set(key, entry);
    return entry.coming;
  }
}

/**
 * {data, error} of an address in a component; path null asks nothing. data is undefined until the first answer, and
 * stays what it was while a newer version is fetched.
 */
export function useAnswer(answers, version, path, query) {
  const key = path === null ? null : Answers.key(path, query);
  const [, redraw] = useState(0);
  const [failed, setFailed] = useState({ key: null, error: null });
  useEffect(() => {
    if (key === null) return undefined;
    let wanted = true;
    answers.load(path, query, version).then(
      () => wanted && (setFailed({ key: null, error: null }), redraw((count) => count + 1)),
      (error) => wanted && setFailed({ key, error: error.message }),
    );
    return () => {
      wanted = false;
    };
  }, [answers, key, version]);
  const kept = key === null ? undefined : answers.peek(path, query);
  const data = kept ? kept.data : undefined;
  return { data, error: failed.key === key && data === undefined ? failed.error : null };
}
