// Runs a job with a generated client: ADDRESS and KEY are the service's, ROWS the samples as JSONL. The result is printed
// as JSON.
import createClient from "openapi-fetch";
import type { components, paths } from "./schema.js";

declare const process: { env: Record<string, string | undefined>; exitCode: number };

type Message = components["schemas"]["StreamMessage"];
type JobStatus = components["schemas"]["JobStatus"];

const client = createClient<paths>({
  baseUrl: process.env.ADDRESS ?? "",
  headers: { Authorization: `Bearer ${process.env.KEY}` },
});

/** The data of a response; a problem is thrown with its text. */
function expectData<T>(outcome: { data?: T; error?: unknown; response: Response }): T {
  if (outcome.error !== undefined) {
    throw new Error((outcome.error as components["schemas"]["ProblemDetails"]).message);
  }
  return outcome.data as T;
}

async function* follow(jobId: string): AsyncGenerator<Message> {
  const { data } = await client.GET("/v1/jobs/{job_id}/events/stream", {
    params: { path: { job_id: jobId } },
    parseAs: "stream",
  });
  const reader = (data as ReadableStream<Uint8Array>).getReader();
  const decoder = new TextDecoder();
  let text = "";
  for (let piece = await reader.read(); !piece.done; piece = await reader.read()) {
    text += decoder.decode(piece.value, { stream: true });
    const lines = text.split("\n");
    text = lines.pop() ?? "";
    for (const line of lines) {
      if (line.startsWith("data: ")) yield JSON.parse(line.slice(6)) as Message;
    }
  }
}

async function main(): Promise<void> {
  const dataset = expectData(
    await client.POST("/v1/datasets", {
      params: { query: { name: "numbers" } },
      headers: { "Content-Type": "application/jsonl" },
      body: process.env.ROWS ?? "",
      bodySerializer: (body) => body as string,
    }),
  );
  const spec: components["schemas"]["DistillationSpec"] = {
    preset: "quick",
    teacher: { random: { layers: 4 } },
    student: { from_teacher: { layers: [0, 3] } },
    data: { train: { dataset: dataset.id } },
    method: { name: "js" },
    curriculum: { stages: 2 },
  };
  const plan = expectData(await client.POST("/v1/jobs/validate", { body: { spec } }));
  const job = expectData(
    await client.POST("/v1/jobs", {
      params: { header: { "Idempotency-Key": "typescript" } },
      body: { name: "typescript", spec },
    }),
  );
  const transitions: JobStatus[] = [];
  const samples: number[] = [];
  for await (const message of follow(job.id)) {
    // The type tells what the data are.
    if (message.type === "status") transitions.push(message.data.to);
    if (message.type === "stage_started") samples.push(message.data.samples);
  }
  const polled = await client.GET("/v1/jobs/{job_id}", { params: { path: { job_id: job.id } } });
  const etag = polled.response.headers.get("etag") ?? "";
  const again = await client.GET("/v1/jobs/{job_id}", {
    params: { path: { job_id: job.id }, header: { "If-None-Match": etag } },
  });
  const checkpoints = expectData(
    await client.GET("/v1/jobs/{job_id}/checkpoints", { params: { path: { job_id: job.id } } }),
  );
  const refused = await client.POST("/v1/jobs", { body: { spec, nmae: "x" } as never });
  console.log(
    JSON.stringify({
      preset: plan.spec.preset,
      epochs: plan.spec.curriculum?.epochs_per_stage,
      transitions,
      samples,
      status: expectData(polled).status,
      again: again.response.status,
      kinds: checkpoints.data.map((each) => each.kind),
      refusal: refused.error?.message,
    }),
  );
}

main().catch((error: unknown) => {
  console.error(error);
  process.exitCode = 1;
});
