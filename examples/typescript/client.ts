// Asks all three services: npm install && npm start HOST:PORT, while `tercet serve` is running.
import { readFileSync } from "node:fs";
import { join } from "node:path";

import * as grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";

import type { ProtoGrpcType as Diabetes } from "./generated/diabetes";
import type { ProtoGrpcType as Digits } from "./generated/digits";
import type { ProtoGrpcType as FizzBuzz } from "./generated/fizzbuzz";

const examples = join(__dirname, "..", "..");
const files = ["diabetes.proto", "digits.proto", "fizzbuzz.proto"];
const definition = loadSync(files, { includeDirs: [join(examples, "..", "proto")], longs: String, keepCase: true, defaults: true });
const { v1 } = (grpc.loadPackageDefinition(definition) as unknown as Diabetes & Digits & FizzBuzz).tercet;
const [address = "127.0.0.1:8001"] = process.argv.slice(2);
const credentials = grpc.credentials.createInsecure();
const options = { deadline: Date.now() + 30_000 };

new v1.Digits(address, credentials).Classify({ images: [{ encoded: readFileSync(join(examples, "seven.png")) }] }, options, (error, response) => {
  if (error) throw error;
  console.log(`seven.png shows a ${response?.digits[0].digit}`);
});
new v1.Diabetes(address, credentials).Assess({ patients: [{ glucose_mg_per_dl: 148, age_years: 50 }] }, options, (error, response) => {
  if (error) throw error;
  console.log(`patient: ${response?.assessments[0].label}`);
});
const words: string[] = [];
new v1.FizzBuzz(address, credentials)
  .Count({ start: 1020, stop: 1026 }, options)
  .on("data", ({ word, model }) => words.push(`${word} (${model})`))
  .on("end", () => console.log(words.join(" ")));
