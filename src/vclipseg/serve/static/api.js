// Requests to the server that this page came from.

export class Failed extends Error {
  constructor(status, detail) {
    super(typeof detail === "string" ? detail : JSON.stringify(detail));
    this.status = status;
  }
}

async function request(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Failed(0, "The server does not answer. Is it still running?");
  }
  if (!response.ok) {
    const content = await response.json().catch(() => ({}));
    throw new Failed(response.status, content.detail ?? response.statusText);
  }
  return response;
}

export const get = async (path) => (await request(path)).json();
export const bytes = async (path, options) => (await request(path, options)).arrayBuffer();
export const send = async (method, path, body) => (await request(path, { method, body })).json();

export const url = (...parts) => "/api/" + parts.map(encodeURIComponent).join("/");

export const sleep = (ms) => new Promise((done) => setTimeout(done, ms));

// Ask for a job until it has ended; `onProgress` sees it each time.
export async function finished(job, onProgress = () => {}, signal = {}) {
  while (job.state === "waiting" || job.state === "running") {
    onProgress(job);
    await sleep(400);
    if (signal.stopped) return null;
    job = await get(url("jobs", job.id));
  }
  onProgress(job);
  if (job.state === "failed") throw new Failed(422, job.message);
  return job;
}
