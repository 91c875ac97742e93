// The address is relative, so that the page also works below a prefix that a proxy adds.
SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#reference",
  deepLinking: true,
  // No validator of another host is asked.
  validatorUrl: null,
});
