// The data of an exported page: base64 of gzip of {address: object}. What a server would compute for an address is put
// together here from those objects; how they are laid out is written in megatron_laser/viewer/export.py.

const GROUP_COLUMNS = ["reward", "score", "length", "answer", "finish"];
const CODED = new Set(["answer", "finish", "source", "outcome"]);

/** Object of a script element that holds it packed; the element is emptied, since it may be large. */
async function unpack(block) {
  const binary = atob(block.textContent.trim());
  const bytes = new Uint8Array(binary.length);
  for (let at = 0; at < binary.length; at += 1) bytes[at] = binary.charCodeAt(at);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  block.textContent = "";
  return new Response(stream).json();
}

export class FileSource {
  constructor(data) {
    this.data = data;
    this.live = false;
    this.parts = new Map();
  }

  /** Of the block of all data but the rows of responses, which are unpacked when they are asked for. */
  static async read(block) {
    if (typeof DecompressionStream === "undefined") {
      throw new Error("this browser cannot unpack the data (no DecompressionStream): use one from 2023 or later");
    }
    return new FileSource(await unpack(block));
  }

  /** Rows that lie together with a response. */
  part(run, number) {
    const id = `responses-${run}-${number}`;
    if (!this.parts.has(id)) {
      const block = document.getElementById(id);
      if (!block) throw new Error("this file has no such response");
      this.parts.set(id, unpack(block));
    }
    return this.parts.get(id);
  }

  async get(path, query = {}) {
    if (path === "response") return this.response(query.run, Number(query.id));
    if (path === "step") return this.step(query.run, Number(query.step));
    if (path === "curves") return this.curves(query.run, query.names);
    return this.object(query.run === undefined ? `api/${path}` : `api/${path}?run=${query.run}`);
  }

  object(address) {
    const found = this.data[address];
    if (found === undefined) throw new Error(`this file has no ${address}`);
    return found;
  }

  curves(run, names) {
    const all = this.object(`api/curves?run=${run}`);
    const wanted = names === undefined ? Object.keys(all.values) : names.split(",");
    const there = wanted.filter((name) => name in all.values);
    return { steps: all.steps, values: Object.fromEntries(there.map((name) => [name, all.values[name]])) };
  }

  step(run, step) {
    const { steps, values } = this.object(`api/curves?run=${run}`);
    const place = steps.indexOf(step);
    if (place < 0) throw new Error(`run ${run} has no step ${step}`);
    const metrics = Object.entries(values).map(([name, column]) => [name, column[place]]);
    return {
      metrics: Object.fromEntries(metrics.filter(([, value]) => value !== null)),
      spans: this.object(`export/steps?run=${run}`)[step] || [],
    };
  }

  async response(run, id) {
    const { part, groups } = this.object(`export/responses?run=${run}`);
    const row = (await this.part(run, Math.floor(id / part)))[id % part];
    if (!row) throw new Error(`this file has no response ${id}`);
    const { ids, votes, ...shared } = groups[row.group];
    const { columns, tables } = this.object(`api/responses?run=${run}`);
    const group = ids.map((member) => {
      const entry = { id: member };
      for (const name of GROUP_COLUMNS) {
        const value = columns[name][member];
        entry[name === "finish" ? "finish_reason" : name] =
          CODED.has(name) && value !== null ? tables[name][value] : value;
      }
      return entry;
    });
    return { ...shared, ...row, group, votes };
  }
}
